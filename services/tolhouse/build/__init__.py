"""The build job: a checkpoint in, a table out."""
