"""MTGR: the network, its data sets, its training and its export. Knows nothing of engines or tuning."""
