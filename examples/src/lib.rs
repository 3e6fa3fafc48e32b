//! Small programs that show FreeFlow from a user's side.
