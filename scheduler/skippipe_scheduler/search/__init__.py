"""Large neighbourhood search: a portfolio of annealing searches, the joint CP-SAT model, the compiled kernel."""
