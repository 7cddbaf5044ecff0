"""The roles between ingress and upstream: guardian, routing, provider. They never import each other."""
