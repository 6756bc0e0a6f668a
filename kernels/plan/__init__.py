"""Plan: snapshot a decode step's rows and claim the pages that must be sealed for it."""
