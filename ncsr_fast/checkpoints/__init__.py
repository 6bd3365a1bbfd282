"""Models in files: functions of state dicts, published and our own."""
