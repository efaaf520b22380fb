"""Studies: methods × seeds × samplers × steps from one recipe, each result a file."""
