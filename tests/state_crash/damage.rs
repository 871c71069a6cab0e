//! Flipped bits and lost tables: the right data or an error, never wrong data.

use super::*;

#[test]
fn every_flipped_bit_of_a_data_block_is_found_when_the_block_is_read() {
    let disk = CardDisk::default();
    small_database(&disk);
    let (backend, _drain) =
        Backend::open(&disk.env(2), Path::new(PATH), Options::default()).unwrap();
    let bytes = disk.edit(Path::new(PATH), |bytes| bytes.len());
    let mut block = vec![0; 4096];

    for bit in 4096 * 8..bytes * 8 {
        disk.flip(Path::new(PATH), bit);
        let number = (bit / 8 / 4096) as u32;
        let error = backend.read(u64::from(number) * 4096, &mut block).unwrap_err();
        assert_eq!(DamagedBlock::inside(&error).unwrap().block, number);
        if bit % 4099 == 0 {
            let found = backend.scrub(0, u32::MAX).unwrap();
            let [Failure::Damaged(damage)] = &found.damaged[..] else { panic!("{found:?}") };
            assert_eq!(damage.block, number);
        }
        disk.flip(Path::new(PATH), bit);
    }
    let found = backend.scrub(0, u32::MAX).unwrap();
    assert_eq!((found.damaged.len(), found.next), (0, None));
    assert_eq!(found.checked as usize, bytes / 4096);
    assert!(matches!(*backend.failure().borrow(), Some(Failure::Damaged(_))));
}

/// The file as redb would read it: headers without our tag, so that repaired ones compare equal.
fn raw_read(disk: &CardDisk, blocks: usize) -> Result<Vec<u8>, String> {
    let (backend, _drain) = Backend::open(&disk.env(2), Path::new(PATH), Options::default())
        .map_err(|error| error.to_string())?;
    let mut bytes = vec![0; (backend.len().unwrap() as usize).min(blocks * 4096)];
    backend.read(0, &mut bytes).map_err(|error| error.to_string())?;
    bytes[320..512].fill(0);
    Ok(bytes)
}

#[test]
fn every_flipped_bit_of_the_header_is_repaired_from_its_copy() {
    let disk = CardDisk::default();
    let contents = small_database(&disk);
    let right = raw_read(&disk, 1).unwrap();
    for bit in 0..4096 * 8 {
        disk.flip(Path::new(PATH), bit);
        assert!(raw_read(&disk, 1).unwrap() == right, "bit {bit}");
        if bit % (8 * 16 + 1) == 0 {
            assert_eq!(open_and_read(&disk.copy()).as_ref(), Ok(&contents), "bit {bit}");
        }
        disk.flip(Path::new(PATH), bit);
    }
}

#[test]
fn destroyed_header_is_restored_even_if_the_power_fails_again() {
    let master = CardDisk::default();
    let contents = small_database(&master);
    master.edit(Path::new(PATH), |bytes| bytes[..512].fill(0x5a));
    let mut restored = 0;
    for cut in 0..30 {
        let disk = master.copy();
        disk.cut_after(cut);
        let cut_off = open_and_read(&disk).is_err();
        assert!(cut_off || cut > 20, "cut {cut}");
        disk.power_on(&mut Chance::new(cut));
        let node = Node::open(&disk.env(3), Options::default()).unwrap();
        restored += u32::from(node.backend.report().header_restored);
        assert_eq!(read_all(&node.database).unwrap(), contents, "cut {cut}");
        node.close().unwrap();
    }
    assert!(restored > 5, "{restored}");
}

/// A sector need not arrive whole. Redb's magic without our tag looked like somebody else's file, whose header then did not
/// pass redb's check: a node whose power went while its card wrote the header did not start again.
#[test]
fn header_of_which_only_the_beginning_arrived_is_restored() {
    let master = CardDisk::default();
    let contents = small_database(&master);
    for kept in [9, 12, 64, 319, 320] {
        for rest in [0x00, 0x5a, 0xff] {
            let disk = master.copy();
            disk.edit(Path::new(PATH), |bytes| bytes[kept..512].fill(rest));
            let node = Node::open(&disk.env(3), Options::default())
                .unwrap_or_else(|error| panic!("{kept} bytes, then {rest:x}: {error}"));
            assert!(node.backend.report().header_restored, "{kept} bytes, then {rest:x}");
            assert_eq!(node.backend.report().table, TableOrigin::Loaded);
            assert_eq!(read_all(&node.database).unwrap(), contents, "{kept} bytes, then {rest:x}");
            node.close().unwrap();
        }
    }
}

#[test]
fn no_flipped_bit_of_the_database_file_gives_wrong_data() {
    let master = CardDisk::default();
    let contents = small_database(&master);
    let used = used_blocks(&master);
    assert!(used.len() > 5, "{used:?}");
    for byte in used.iter().flat_map(|block| (block * 4096..(block + 1) * 4096).step_by(41)) {
        assert!(flip_is_refused(&master, &contents, byte), "byte {byte} is in a page that is read");
    }
}

/// Pages that reading everything comes by.
fn used_blocks(master: &CardDisk) -> Vec<usize> {
    let contents = open_and_read(&master.copy()).unwrap();
    let blocks = master.edit(Path::new(PATH), |bytes| bytes.len()) / 4096;
    (1..blocks).filter(|block| flip_is_refused(master, &contents, block * 4096 + 9)).collect()
}

fn flip_is_refused(master: &CardDisk, contents: &Contents, byte: usize) -> bool {
    let disk = master.copy();
    disk.flip(Path::new(PATH), byte * 8 + byte % 8);
    let found = open_and_read(&disk);
    assert!(found.as_ref().is_ok_and(|found| found == contents) || found.is_err(), "{byte}");
    found.is_err()
}

#[test]
fn no_flipped_bit_of_a_table_file_costs_the_data() {
    let disk = CardDisk::default();
    let contents = small_database(&disk);
    let right = raw_read(&disk, 40).unwrap();
    for path in TABLE_PATHS.map(Path::new) {
        let Ok(true) = disk.exists(path) else { continue };
        // The second file is made ahead of its use, and empty until then.
        let last = disk.edit(path, |bytes| bytes.iter().rposition(|byte| *byte != 0));
        let Some(used) = last else { continue };
        for bit in 0..(used + 64) * 8 {
            // Padding takes the most part; one bit of each of its bytes will do.
            let padding = disk.edit(path, |bytes| bytes[bit / 8] == 0);
            if padding && bit % 8 != bit / 8 % 8 {
                continue;
            }
            disk.flip(path, bit);
            assert!(raw_read(&disk, 40).unwrap() == right, "bit {bit} of {path:?}");
            if bit % 997 == 0 {
                let found = open_and_read(&disk.copy());
                assert_eq!(found.as_ref(), Ok(&contents), "bit {bit} of {path:?}");
            }
            disk.flip(path, bit);
        }
    }
}

#[test]
fn damage_reaches_the_owner_through_redb_with_its_block() {
    let disk = CardDisk::default();
    small_database(&disk);
    let bytes = disk.edit(Path::new(PATH), |bytes| bytes.len());
    let mut seen = 0;
    for block in 1..bytes / 4096 {
        let disk = disk.copy();
        disk.flip(Path::new(PATH), block * 4096 * 8 + 99);
        let (backend, _drain) =
            Backend::open(&disk.env(2), Path::new(PATH), Options::default()).unwrap();
        let error = match redb_over(backend.clone()) {
            Err(redb::DatabaseError::Storage(error)) => error,
            Err(other) => panic!("{other}"),
            Ok(database) => match read_all(&database) {
                Err(redb::Error::Io(error)) => redb::StorageError::Io(error),
                Err(other) => panic!("{other}"),
                Ok(_) => continue,
            },
        };
        let damage = DamagedBlock::cause_of(&error).unwrap();
        assert_eq!(damage.block as usize, block);
        assert_eq!(damage.offset, block as u64 * 4096);
        let reported = backend.failure().borrow().clone();
        assert!(matches!(reported, Some(Failure::Damaged(reported)) if reported == damage));
        seen += 1;
    }
    assert!(seen > 3, "{seen} blocks of {}", bytes / 4096);
}

#[test]
fn lost_table_is_made_anew_from_a_sound_database() {
    let disk = CardDisk::default();
    let contents = small_database(&disk);
    for path in TABLE_PATHS.map(Path::new) {
        if disk.exists(path).unwrap() {
            disk.remove(path).unwrap();
        }
    }

    let node = Node::open(&disk.env(2), Options::default()).unwrap();

    assert_eq!(node.backend.report().table, TableOrigin::Rebuilt(RebuildReason::Missing));
    assert_eq!(read_all(&node.database).unwrap(), contents);
    node.close().unwrap();
    let node = Node::open(&disk.env(3), Options::default()).unwrap();
    assert_eq!(node.backend.report().table, TableOrigin::Loaded);
}

#[test]
fn lost_table_and_a_damaged_page_give_no_wrong_data() {
    let master = CardDisk::default();
    let contents = small_database(&master);
    let used = used_blocks(&master);
    assert!(used.len() > 5, "{used:?}");
    for path in TABLE_PATHS.map(Path::new) {
        if master.exists(path).unwrap() {
            master.remove(path).unwrap();
        }
    }
    for byte in used.iter().flat_map(|block| (block * 4096..(block + 1) * 4096).step_by(211)) {
        let disk = master.copy();
        disk.flip(Path::new(PATH), byte * 8 + byte % 8);
        match open_and_read(&disk) {
            // Free space inside a page is not all covered by redb's checksums.
            Ok(found) => assert_eq!(found, contents, "byte {byte}"),
            Err(error) => assert!(error.contains("table is lost"), "{error}"),
        }
    }
}

#[test]
fn table_of_another_database_is_not_believed() {
    let disk = CardDisk::default();
    let contents = small_database(&disk);
    let other = CardDisk::default();
    let mut node = Node::open(&other.env(77), Options::default()).unwrap();
    commit(&node.database, Commit::QuickRepair, &[(5, Some(vec![5]))]).unwrap();
    node.poll(10_000);
    node.close().unwrap();
    let stranger = other.edit(Path::new(TABLE_PATHS[0]), |bytes| bytes.clone());
    disk.edit(Path::new(TABLE_PATHS[0]), |bytes| *bytes = stranger);

    let node = Node::open(&disk.env(2), Options::default()).unwrap();

    assert_eq!(node.backend.report().table, TableOrigin::Rebuilt(RebuildReason::Foreign));
    assert_eq!(read_all(&node.database).unwrap(), contents);
}

#[test]
fn plain_redb_file_is_taken_over_after_a_check() {
    let disk = CardDisk::default();
    let env = disk.env(1);
    let plain = Plain::create(&env, Path::new(PATH));
    let database = redb_over(plain).unwrap();
    commit(&database, Commit::OnePhase, &[(8, Some(vec![8; 8]))]).unwrap();
    drop(database);

    assert_eq!(open_and_read(&disk).unwrap(), Contents::from([(8, vec![8; 8])]));
    assert_eq!(open_and_read(&disk).unwrap(), Contents::from([(8, vec![8; 8])]));
}
