"""A folder of refined predictions that survives kills."""
