"""The build job, which makes a table from a checkpoint."""
