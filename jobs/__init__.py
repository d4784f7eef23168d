"""The experiments: Ray jobs over the app's handle. Nothing imports this package."""
