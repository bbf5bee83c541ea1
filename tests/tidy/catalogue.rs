//! The tables in `tests/README.md` hold what they say: every scenario and case has its row, every
//! test that a row names exists, and every file of tests is in the table of programs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_scenario_and_case_has_a_row_with_tests_that_exist() {
    let rows = rows();
    let mut faults = Vec::new();
    for (kind, numbers) in [("S", SCENARIOS), ("C", CASES)] {
        for number in numbers.iter().flat_map(|(first, last)| *first..=*last) {
            let key = format!("{kind}{number}");
            if !rows.iter().any(|row| row.key == key) {
                faults.push(format!("{key} has no row"));
            }
        }
    }
    let keys: BTreeSet<&str> = rows.iter().map(|row| row.key.as_str()).collect();
    if keys.len() != rows.len() {
        faults.push("a key has two rows".to_owned());
    }
    for row in &rows {
        if !row.named && !row.text.contains("not here:") {
            faults.push(format!("{} names neither a test nor a reason", row.key));
        }
    }
    assert!(faults.is_empty(), "tests/README.md:\n{}", faults.join("\n"));
}

#[test]
fn every_test_that_a_table_names_is_there() {
    let mut faults = Vec::new();
    let mut count = 0;
    let text = read();
    for (file, test) in text.lines().filter(|line| line.starts_with("| ")).flat_map(tests) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let text = fs::read_to_string(path).unwrap_or_default();
        if !text.contains(&format!("fn {test}(")) && !text.contains(&format!("fn {test}<")) {
            faults.push(format!("{file} has no test {test}"));
        }
        count += 1;
    }
    assert!(count > 300, "only {count} names were found");
    assert!(faults.is_empty(), "tests/README.md:\n{}", faults.join("\n"));
}

/// The tests that a line names as `file::test`.
fn tests(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split('`').skip(1).step_by(2).filter_map(|name| name.split_once("::"))
}

#[test]
fn every_file_of_tests_is_in_the_table_of_programs() {
    let text = read();
    let mut faults = Vec::new();
    for entry in entries(Path::new("tests")) {
        let name = entry.file_stem().expect("a name").display();
        if entry.extension().is_some_and(|extension| extension == "rs") {
            if !text.contains(&format!("\n| `{name}` | |")) {
                faults.push(format!("{name} is no program of the table"));
            }
            continue;
        }
        // What is in folders without a program belongs to others.
        if !entry.join("main.rs").exists() {
            continue;
        }
        let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` | ")));
        let modules = row.and_then(|row| row.split(" | ").nth(1)).unwrap_or_default();
        let program = fs::read_to_string(entry.join("main.rs")).expect("it is readable");
        for file in entries(&entry) {
            let module = file.file_stem().expect("a name").display().to_string();
            if module == "main" {
                continue;
            }
            if !modules.split(", ").any(|it| it == format!("`{module}`")) {
                faults.push(format!("{name} has no {module} in the table"));
            }
            if !program.lines().any(|line| line == format!("mod {module};")) {
                faults.push(format!("tests/{name}/main.rs does not include {module}"));
            }
        }
    }
    assert!(faults.is_empty(), "tests/README.md:\n{}", faults.join("\n"));
}

/// What is in a folder of the package.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = fs::read_dir(folder).expect("it is a folder");
    let paths = entries.map(|entry| entry.expect("it is readable").path());
    paths.filter(|path| path.is_dir() || path.extension().is_some_and(|it| it == "rs")).collect()
}

/// One line of a table: its key, and whether it names a test.
struct Row {
    key: String,
    named: bool,
    text: String,
}

fn rows() -> Vec<Row> {
    read().lines().filter_map(Row::read).collect()
}

fn read() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/README.md");
    fs::read_to_string(path).expect("tests/README.md")
}

impl Row {
    fn read(line: &str) -> Option<Row> {
        let (key, rest) = line.strip_prefix("| ")?.split_once(" | ")?;
        let number = key.strip_prefix(['S', 'C'])?;
        number.parse::<u32>().ok()?;
        let named = tests(rest).next().is_some();
        Some(Row { key: key.to_owned(), named, text: rest.to_owned() })
    }
}

/// The scenarios of connections, drains, deadlines and overload that are promised.
const SCENARIOS: &[(u32, u32)] = &[(1, 26), (34, 36), (38, 66)];
/// The adversarial cases of the kernel's side.
const CASES: &[(u32, u32)] = &[(1, 43)];
