"""Studies: methods × seeds × samplers × steps from one recipe, with a file for each result."""
