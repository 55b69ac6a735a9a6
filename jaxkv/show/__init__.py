"""What a person sees: numbers as text, tables, progress bars, HTML."""
