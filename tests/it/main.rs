//! Integration tests, one binary so that they link once.

mod pki;
mod unit_file;
