"""How fast: our collection and training beside others', in one run."""
