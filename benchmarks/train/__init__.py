"""Training recipes on data that every machine has, the paper's own, and the study that compares methods with them."""
