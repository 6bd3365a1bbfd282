"""Models in files: functions of state dicts, published and of this package."""
