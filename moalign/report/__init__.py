"""A comparison for people: terminal tables, the figure of the fronts, a Markdown page. Everything from its JSON."""
