"""What the tests share, one subject a file. No test imports another one."""
