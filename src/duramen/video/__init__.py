"""Video diffusion in little memory: exact slicing of what stock pipelines compute, and steps that are taken again."""
