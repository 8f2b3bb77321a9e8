"""Machine code for single operations, made by LLVM when it is first needed."""
