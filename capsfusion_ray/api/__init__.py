"""What `import capsfusion_ray as cf` offers (docs/api.md), and what the jobs of the command call."""
