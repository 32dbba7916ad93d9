"""The course chapter's exercise: methods compared by a reward none of them sees, at equal distance from the base."""
