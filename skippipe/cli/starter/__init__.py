"""The folder with which a user begins: example experiments, clusters, launch templates."""
