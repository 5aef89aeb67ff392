"""The laboratory: tasks by name, recipes, sweeps, studies, the matrix of families, the demo."""
