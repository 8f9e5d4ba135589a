"""Results, statistics, tables, figures and the page of a sweep."""
