"""Several processes: groups that stay up, models in shards, each strategy, and what a rank is to pay."""
