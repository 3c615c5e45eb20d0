"""The paper's findings at the scale of two cores: SCIENCE.md has what they gave."""
