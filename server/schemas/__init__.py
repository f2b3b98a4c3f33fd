"""What requests may hold and what answers look like: the source of /docs."""
