RIVALS: dict = {}
