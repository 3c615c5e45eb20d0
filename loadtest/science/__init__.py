"""The paper's experiments at a scale that two cores can run. SCIENCE.md has the results."""
