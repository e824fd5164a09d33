"""What a run shows: panels, charts, logger pictures, tables, the report."""
