"""The YAML experiment: typed models of every section, reading with overrides. Light to import: no torch."""
