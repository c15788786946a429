"""MTGR inside vLLM: a plugin for its V1 engine, and the adapter that serves it."""
