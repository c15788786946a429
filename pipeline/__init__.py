"""Tune, prove and ship the fastest way to serve an MTGR ranking model."""
