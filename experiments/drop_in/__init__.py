"""Other people's models before and after ``convert_attention``: one table of classes and properties."""
