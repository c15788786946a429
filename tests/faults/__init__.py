"""Bad luck: crashes, hangs, hogs, leaks, kills, full disks. Each gives one clear message and loses nothing that was finished."""
