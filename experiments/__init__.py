"""The comparisons: one folder a question, one JSON a run, tables and figures made from those alone."""
