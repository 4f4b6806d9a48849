"""What `skippipe demo` runs."""
