"""Models, their layers and inputs, adapters on them, and what is right for them in float64."""
