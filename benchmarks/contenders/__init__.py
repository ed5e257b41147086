"""One file a peer: each makes a :class:`~benchmarks.contenders.base.Run` of a problem, or says why it does not."""
