"""Pictures of adapters: what is measured and what is concluded from it, and apart from these what draws it."""
