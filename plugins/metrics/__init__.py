"""Metrics (`metric=`): how images are looked at."""
