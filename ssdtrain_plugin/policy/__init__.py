"""Who decides what to offload. Integers in, a decision out; moves nothing."""
