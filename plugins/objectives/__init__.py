"""Training losses (`objective=`), composed of an interval, a time distribution, an anchor and a shortcut."""
