"""Pictures and the page that tells a run: figures are returned, never shown."""
