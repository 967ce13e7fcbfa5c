// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Archive packs a folder so that the same content gives the same bytes: names sorted, one
// time, no owner, and no mode but "executable or not". The tar, gzip and zip commands of
// different systems would differ.
//
//	archive OUT.tar.gz FOLDER
//	archive OUT.zip FOLDER
package main

import (
	"archive/tar"
	"archive/zip"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// modTime is the time of every file: the earliest that zip can hold.
var modTime = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: archive OUT.tar.gz|OUT.zip FOLDER")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "archive:", err)
		os.Exit(1)
	}
}

// run packs folder, under its own name, into the file out.
func run(out, folder string) error {
	file, err := os.Create(out)
	if err != nil {
		return err
	}
	pack := packTar
	if strings.HasSuffix(out, ".zip") {
		pack = packZip
	}
	return errors.Join(pack(file, filepath.Clean(folder)), file.Close())
}

// walk calls add for each file below folder, sorted by name. It refuses what is neither
// a file nor a folder.
func walk(folder string, add func(name string, mode fs.FileMode, file *os.File) error) error {
	return filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		if !entry.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file", path)
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(filepath.Dir(folder), path)
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if info.Mode()&0o100 != 0 {
			mode = 0o755
		}
		return add(filepath.ToSlash(name), mode, file)
	})
}

func packTar(w io.Writer, folder string) error {
	gz, err := gzip.NewWriterLevel(w, gzip.BestCompression) // writes no time and no name
	if err != nil {
		return err
	}
	tw := tar.NewWriter(gz)
	err = walk(folder, func(name string, mode fs.FileMode, file *os.File) error {
		size, err := file.Seek(0, io.SeekEnd)
		if err == nil {
			_, err = file.Seek(0, io.SeekStart)
		}
		if err != nil {
			return err
		}
		err = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: int64(mode), ModTime: modTime})
		if err != nil {
			return err
		}
		_, err = io.Copy(tw, file)
		return err
	})
	return errors.Join(err, tw.Close(), gz.Close())
}

func packZip(w io.Writer, folder string) error {
	zw := zip.NewWriter(w)
	err := walk(folder, func(name string, mode fs.FileMode, file *os.File) error {
		header := &zip.FileHeader{Name: name, Method: zip.Deflate, Modified: modTime}
		header.SetMode(mode)
		part, err := zw.CreateHeader(header)
		if err != nil {
			return err
		}
		_, err = io.Copy(part, file)
		return err
	})
	return errors.Join(err, zw.Close())
}
