"""One module per host framework; the only place where a host is imported."""
