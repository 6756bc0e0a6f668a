"""Page scores of query heads, made comparable."""
