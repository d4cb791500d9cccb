"""One adapted layer: how B @ A lies in its weight, its forward, its exact merge. Nothing here knows a whole model."""
