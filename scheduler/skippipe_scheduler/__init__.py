"""The path scheduler: placement, routes and order for partial, reordered pipelines. Needs no torch."""
