"""The course chapter's exercise: methods compared by a reward that none of them sees, at equal distance from the base."""
