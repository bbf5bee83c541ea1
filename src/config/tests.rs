//! The claims of the table, the parser and the explanation. No test touches the environment of the
//! process: `Config::from_vars` takes the variables as values.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::*;

fn environment(vars: &[(&str, &str)]) -> Result<Config> {
    Config::from_vars(vars.iter().map(|&(name, value)| (name.into(), value.into())))
}

fn refusal(vars: &[(&str, &str)]) -> String {
    let error = environment(vars).expect_err("must be refused");
    assert_eq!(error.kind(), ErrorKind::Config);
    error.to_string()
}

/// Texts just outside the form, and malformed ones.
fn bad_texts(form: &Form) -> Vec<String> {
    let mut bad: Vec<String> =
        ["x", "-1", "+1", " 1", "1 ", "1.0", "1e3", "0x10", "1_000", "10ms", "²", "\n", ","]
            .map(str::to_owned)
            .into();
    bad.push(u64::MAX.to_string());
    bad.push("9".repeat(10_000));
    match *form {
        Form::Within { min, max } => {
            bad.extend(min.checked_sub(1).map(|below| below.to_string()));
            bad.push((max + 1).to_string());
        }
        Form::OffOr { min, max } => {
            bad.extend((min > 1).then(|| (min - 1).to_string()));
            bad.push((max + 1).to_string());
        }
        Form::PowerOfTwo { min, max } => {
            bad.extend([0, min / 2, min + 1, max - 1, max * 2].map(|value| value.to_string()));
        }
        Form::MultipleOf { step, min, max } => {
            bad.extend([0, min - step, min + 1, max + step].map(|value| value.to_string()));
        }
        Form::OneOf(words) => {
            bad.extend(words.iter().map(|word| format!("{word}{word}")));
            bad.extend(["true", "yes", "TEXT", "Auto", "2"].map(str::to_owned));
        }
        Form::Addresses | Form::Cpus => {}
    }
    bad
}

/// The smallest and the greatest text of the form, and those between that differ in kind.
fn good_texts(form: &Form) -> Vec<String> {
    match *form {
        Form::Within { min, max } | Form::PowerOfTwo { min, max } => {
            vec![min.to_string(), max.to_string()]
        }
        Form::MultipleOf { step, min, max } => [min, min + step, max].map(|v| v.to_string()).into(),
        Form::OffOr { min, max } => [0, min, max].map(|value| value.to_string()).into(),
        Form::OneOf(words) => words.iter().map(|&word| word.to_owned()).collect(),
        Form::Addresses => ["[::1]:0", "unix:@x", "unix:x"].map(str::to_owned).into(),
        Form::Cpus => ["0", "4095", "3,0-2", "auto"].map(str::to_owned).into(),
    }
}

#[test]
fn every_default_is_inside_its_bounds() {
    for variable in VARIABLES {
        let default = (variable.default)();
        assert_eq!(variable.form.check(&default), Ok(()), "{}={default}", variable.name);
    }
    Config::default().validate().expect("the defaults must fit together");
    assert_eq!(Config::default().explain().warnings(), [""; 0]);
}

#[test]
fn defaults_are_the_documented_ones() {
    let settings = Config::default().settings().expect("valid");
    assert_eq!(settings.pin, None);
    assert_eq!((settings.sq_entries, settings.cq_entries), (512, 4096));
    assert_eq!((settings.buffers, settings.buffer_bytes), (512, 4096));
    assert_eq!((settings.backlog, settings.connections_max), (4096, 10_000));
    assert!(settings.nodelay);
    assert_eq!((settings.keepalive_idle_s, settings.keepalive_interval_s), (30, 10));
    assert_eq!((settings.keepalive_count, settings.user_timeout_ms), (3, 60_000));
    assert_eq!((settings.first_byte_ms, settings.idle_ms), (10_000, 75_000));
    assert_eq!((settings.write_stall_ms, settings.lifetime_ms), (30_000, 86_400_000));
    assert_eq!(settings.linger_ms, 2000);
    assert_eq!((settings.receive_queue_bytes, settings.send_queue_bytes), (131_072, 262_144));
    assert_eq!((settings.task_budget, settings.expiry_budget), (256, 256));
    assert_eq!((settings.completion_budget, settings.tasks_max), (1024, 1_000_000));
    assert_eq!((settings.lameduck_ms, settings.drain_ms), (0, 25_000));
    assert_eq!((settings.new_grace_ms, settings.force_grace_ms), (1000, 100));
    assert_eq!(settings.bind_retry_ms, 1000);
    assert_eq!(settings.report, ReportFormat::Text);
    assert_eq!(Config::default().listen_addresses(), ["127.0.0.1:7000"]);
    assert_eq!(Config::default().cpu_list().expect("valid"), None);
}

#[test]
fn every_bad_value_is_refused_with_variable_value_and_bounds() {
    for variable in VARIABLES {
        for bad in bad_texts(&variable.form) {
            if matches!(variable.form, Form::Cpus) && bad.trim() == "1" {
                continue; // The items of a list may have spaces around them.
            }
            let text = refusal(&[(variable.name, &bad)]);
            let given = format!("{}={} (environment)", variable.name, form::quoted(&bad));
            assert!(text.starts_with(&given), "{text}");
            assert!(text.ends_with(variable.bounds), "{text}");
            assert!(text.len() < 600, "a long value must be cut short: {} bytes", text.len());
        }
    }
}

#[test]
fn every_bound_is_itself_allowed_and_fits_its_type() {
    for variable in VARIABLES {
        for good in good_texts(&variable.form) {
            let config = environment(&[(variable.name, &good)]).expect("inside the bounds");
            assert_eq!(config.lookup(variable), (good.as_str().into(), Source::Environment));
            Settings::read(&config).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

#[test]
fn setters_are_checked_by_validate() {
    let error = Config::default().idle_ms(0).validate().unwrap_err();
    assert_eq!(
        error.to_string(),
        "SLIPRING_IDLE_MS=\"0\" (code): out of bounds; \
         expected milliseconds, 1 to 86400000"
    );
    assert!(Config::default().cpus("1,1").validate().is_err());
    assert!(Config::default().listen("").validate().is_err());
    assert!(Config::default().buffer_bytes(4097).validate().is_err());
    assert!(Config::default().user_timeout_ms(999).validate().is_err());
    Config::default().user_timeout_ms(0).linger_ms(0).validate().expect("0 = off is written out");
}

#[test]
fn who_balances_by_cpu_pins() {
    let config = Config::default().balance(Balance::Cpu);
    config.validate().expect("pinned by default");
    let error = config.pin(Some(false)).validate().unwrap_err().to_string();
    let expected = "SLIPRING_BALANCE=\"cpu\" (code): needs cores that are pinned, unlike \
                    SLIPRING_PIN=\"0\" (code)";
    assert_eq!(error, expected);
}

#[test]
fn setters_reach_the_settings() {
    let config = Config::default().pin(Some(false)).nodelay(false).connections_max(7);
    let settings = config.report(ReportFormat::Json).settings().expect("valid");
    assert_eq!((settings.pin, settings.nodelay), (Some(false), false));
    assert_eq!((settings.connections_max, settings.report), (7, ReportFormat::Json));
}

#[test]
fn an_unknown_name_is_refused_with_the_nearest_known_one() {
    for (typo, meant) in [
        ("SLIPRING_IDEL_MS", "SLIPRING_IDLE_MS"),
        ("SLIPRING_IDLE", "SLIPRING_IDLE_MS"),
        ("SLIPRING_CONNECTION_MAX", "SLIPRING_CONNECTIONS_MAX"),
        ("SLIPRING_BUFFER", "SLIPRING_BUFFERS"),
        ("SLIPRING_idle_ms", "SLIPRING_IDLE_MS"),
        ("SLIPRING_KEEPALIVE_IDLE_MS", "SLIPRING_KEEPALIVE_IDLE_S"),
    ] {
        let text = refusal(&[(typo, "1")]);
        assert!(text.contains(typo), "{text}");
        assert!(text.ends_with(&format!("nearest known name is {meant}")), "{text}");
    }
    refusal(&[("SLIPRING_", "1")]);
    assert!(!refusal(&[("SLIPRING_\x1b[2J", "1")]).contains('\x1b'));
    refusal(&[(&format!("SLIPRING_{}", "A".repeat(100_000)), "1")]);
}

#[test]
fn other_names_are_none_of_its_business() {
    let config = environment(&[("PATH", "/bin"), ("SLIPRIN", "1"), ("MY_SLIPRING_X", "1")]);
    assert!(config.expect("ignored").given.is_empty());
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let config = environment(&[("SLIPRING_IDLE_MS", ""), ("SLIPRING_LISTEN", "")]).expect("valid");
    assert_eq!(config.lookup(&IDLE_MS), ("75000".into(), Source::Default));
    assert_eq!(config.listen_addresses(), ["127.0.0.1:7000"]);
}

#[test]
fn a_value_or_name_that_is_not_utf8_is_refused() {
    let bytes = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let value = [(bytes(b"SLIPRING_IDLE_MS"), bytes(b"75\xff"))];
    let error = Config::from_vars(value).unwrap_err().to_string();
    assert!(error.starts_with("SLIPRING_IDLE_MS=") && error.contains("not UTF-8"), "{error}");
    let name = [(bytes(b"SLIPRING_IDLE_M\xff"), bytes(b"1"))];
    let error = Config::from_vars(name).unwrap_err().to_string();
    assert!(error.contains("nearest known name is SLIPRING_IDLE_MS"), "{error}");
}

#[test]
fn of_several_problems_the_first_by_name_is_reported() {
    let mut vars = [("SLIPRING_PIN", "x"), ("SLIPRING_IDLE_MS", "x"), ("SLIPRING_REPORT", "x")];
    for _ in 0..vars.len() {
        vars.rotate_left(1);
        assert!(refusal(&vars).starts_with("SLIPRING_IDLE_MS="));
    }
}

#[test]
fn code_overrules_the_environment_and_both_are_named_as_source() {
    let config = environment(&[("SLIPRING_IDLE_MS", "5000"), ("SLIPRING_BACKLOG", "9")]);
    let config = config.expect("valid").idle_ms(6000);
    let text = config.explain().to_string();
    assert!(text.contains("SLIPRING_IDLE_MS = 6000 (code)\n"), "{text}");
    assert!(text.contains("SLIPRING_BACKLOG = 9 (environment)\n"), "{text}");
    assert!(text.contains("SLIPRING_BUFFERS = 512 (default)\n"), "{text}");
    for variable in VARIABLES {
        assert!(text.contains(&format!("{} = ", variable.name)), "{text}");
    }
    let equals: Vec<_> = text.lines().take(VARIABLES.len()).map(|line| line.find('=')).collect();
    assert!(equals.iter().all(|column| *column == equals[0]), "the lines are aligned: {text}");
}

#[test]
fn values_that_do_not_fit_together_are_refused_by_both_names() {
    let error = Config::default().sq_entries(4096).validate().unwrap_err().to_string();
    assert!(error.contains("SLIPRING_CQ_ENTRIES=\"4096\" (default)"), "{error}");
    assert!(error.contains("SLIPRING_SQ_ENTRIES=\"4096\" (code)"), "{error}");
    Config::default().sq_entries(4096).cq_entries(8192).validate().expect("twice is enough");

    let error = Config::default().buffer_bytes(262_144).validate().unwrap_err().to_string();
    assert!(error.contains("SLIPRING_RECEIVE_QUEUE_BYTES=\"131072\" (default)"), "{error}");
    assert!(error.contains("SLIPRING_BUFFER_BYTES=\"262144\" (code)"), "{error}");
    Config::default().buffer_bytes(131_072).validate().expect("one buffer is enough");
}

#[test]
fn cpu_lists_keep_their_order() {
    let cpus = |text: &str| form::cpus(text);
    assert_eq!(cpus("auto"), Ok(None));
    assert_eq!(cpus("0-3,8"), Ok(Some(vec![0, 1, 2, 3, 8])));
    assert_eq!(cpus("8, 2 ,4-4"), Ok(Some(vec![8, 2, 4])));
    assert_eq!(cpus("0-4095").map(|list| list.map(|cpus| cpus.len())), Ok(Some(4096)));
    assert_eq!(
        Config::default().cpus("5,1").cpu_list().expect("valid"),
        Some(vec![5, 1]),
        "the first core runs on the CPU named first"
    );
}

#[test]
fn hostile_cpu_lists_are_refused_without_growing() {
    for (text, reason) in [
        ("3-0", "runs backwards"),
        ("1,1", "CPU 1 is named twice"),
        ("0-3,2-5", "CPU 2 is named twice"),
        ("4096", "above 4095"),
        ("0-4294967295", "above 4095"),
        ("0-18446744073709551615", "above 4095"),
        ("0-99999999999999999999", "not a CPU's number"),
        ("1-2-3", "not a CPU's number"),
        ("-1", "not a CPU's number"),
        ("1-", "not a CPU's number"),
        ("1,,2", "not a CPU's number"),
        ("0-3:2", "not a CPU's number"),
        ("all", "not a CPU's number"),
    ] {
        let found = form::cpus(text).expect_err(text);
        assert!(found.contains(reason), "{text}: {found}");
    }
    let long = vec!["0-4095"; 100_000].join(",");
    assert_eq!(form::cpus(&long), Err("CPU 0 is named twice".to_owned()));
}

#[test]
fn listen_addresses_are_checked_and_split() {
    let text = "127.0.0.1:7000, [::1]:7000,unix:/run/x.sock,unix:@name";
    let config = environment(&[("SLIPRING_LISTEN", text)]).expect("valid");
    assert_eq!(
        config.listen_addresses(),
        ["127.0.0.1:7000", "[::1]:7000", "unix:/run/x.sock", "unix:@name"]
    );
    let long = format!("unix:/{}", "x".repeat(107));
    for bad in ["localhost:7000", "7000", "127.0.0.1", "[::1]", "1.2.3.4:65536", &long] {
        refusal(&[("SLIPRING_LISTEN", bad)]);
    }
    for bad in ["unix:", "unix:@", "unix: ", "127.0.0.1:1,", ",", "tcp:127.0.0.1:1"] {
        refusal(&[("SLIPRING_LISTEN", bad)]);
    }
    assert!(Config::default().listen("unix:a\0b").validate().is_err());
}

#[test]
fn explain_computes_when_a_dead_peer_is_found() {
    let text = Config::default().explain().to_string();
    assert!(text.contains("idle connection: found after about 60 s"), "{text}");
    assert!(text.contains("unacknowledged data: found after about 30 s"), "{text}");
    assert!(text.contains("output still queued: found after 37500 ms at most"), "{text}");
    assert!(text.contains("half-closed before: found after 30 s"), "{text}");
    assert!(!text.contains("heartbeat is sent"), "{text}");
    let sooner = Config::default().user_timeout_ms(20_000).heartbeat_ms(10_000);
    let text = sooner.explain().to_string();
    assert!(text.contains("unacknowledged data: found after about 20 s"), "{text}");
    assert!(text.contains("output still queued: found after 20 s at most"), "{text}");
    assert!(text.contains("a heartbeat is sent: found after 16 s at most"), "{text}");
    assert!(text.contains("512 of 4096 bytes, 2048 KiB a core"), "{text}");
}

#[test]
fn keepalive_time_follows_the_measured_rule() {
    // Idle 2 s, interval 1 s, count 3: user timeout in ms, seconds until found (last row computed).
    for (user_timeout_ms, found_s) in [(0, 5), (2_500, 3), (3_500, 4), (10_000, 10), (1_000, 3)] {
        let config = Config::default().keepalive_idle_s(2).keepalive_interval_s(1);
        let text = config.user_timeout_ms(user_timeout_ms).explain().to_string();
        let fact = format!("idle connection: found after about {found_s} s\n");
        assert!(text.contains(&fact), "user timeout {user_timeout_ms} ms: {text}");
    }
}

/// Scenario 42 is the first of these.
#[test]
fn explain_warns_of_what_is_probably_not_meant() {
    let warned = |config: Config, name: &str| {
        let explanation = config.explain();
        assert_eq!(explanation.warnings().len(), 1, "{explanation}");
        assert!(explanation.warnings()[0].starts_with(name), "{explanation}");
        assert!(explanation.to_string().contains(&format!("\nwarning: {name}")), "{explanation}");
    };
    warned(Config::default().user_timeout_ms(60_001), "SLIPRING_USER_TIMEOUT_MS = 60001 is above");
    warned(Config::default().user_timeout_ms(0), "SLIPRING_USER_TIMEOUT_MS is off");
    warned(Config::default().first_byte_ms(75_001), "SLIPRING_FIRST_BYTE_MS");
    warned(Config::default().heartbeat_ms(75_000), "SLIPRING_HEARTBEAT_MS");
    warned(Config::default().half_close_ms(60_001), "SLIPRING_HALF_CLOSE_MS");
    warned(Config::default().min_rate_grace_ms(30_001), "SLIPRING_MIN_RATE_GRACE_MS");
    warned(Config::default().lifetime_ms(70_000), "SLIPRING_IDLE_MS = 75000 is above");
    warned(Config::default().lameduck_ms(25_000), "SLIPRING_LAMEDUCK_MS");
    warned(Config::default().write_stall_ms(60_001), "SLIPRING_WRITE_STALL_MS = 60001 is above");
    warned(Config::default().new_grace_ms(25_001), "SLIPRING_NEW_GRACE_MS = 25001 is above");
    warned(Config::default().idle_min_keep_ms(25_001), "SLIPRING_IDLE_MIN_KEEP_MS");
    warned(Config::default().close_spread_ms(25_001), "SLIPRING_CLOSE_SPREAD_MS");
    warned(Config::default().force_grace_ms(2_501), "SLIPRING_FORCE_GRACE_MS = 2501 is above");
    warned(Config::default().idle_ms(0), "SLIPRING_IDLE_MS=\"0\" (code): out of bounds");
}

#[test]
fn explain_survives_any_text() {
    let config =
        Config::default().listen(&"\n\x1b[2J".repeat(100_000)).cpus("é".repeat(99).as_str());
    let text = config.explain().to_string();
    assert!(!text.contains('\x1b') && text.len() < 10_000, "{}", text.len());
}

#[test]
fn the_markdown_table_has_one_row_per_variable() {
    let table = Config::table_markdown();
    let rows: Vec<_> = table.lines().skip(2).collect();
    assert_eq!(rows.len(), VARIABLES.len());
    for (row, variable) in rows.iter().zip(VARIABLES) {
        assert!(row.starts_with(&format!("| `{}` | `", variable.name)), "{row}");
        assert_eq!(row.matches('|').count(), 5, "a bar in a cell breaks the table: {row}");
    }
    assert!(rows.iter().any(|row| row.contains("| `75000` | milliseconds, 1 to 86400000 | ")));
}

#[test]
fn names_are_unique_and_carry_the_prefix() {
    let names: std::collections::BTreeSet<_> = VARIABLES.iter().map(|v| v.name).collect();
    assert_eq!(names.len(), VARIABLES.len());
    assert!(names.iter().all(|name| name.starts_with(PREFIX)));
}
