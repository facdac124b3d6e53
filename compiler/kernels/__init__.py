"""Operations with a backward of their own, each one file with its plain torch reference beside it."""
